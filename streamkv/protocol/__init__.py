"""The native wire protocol: messages (msgspec) and a sans-IO session. No socket, no event loop, no clock."""
