"""aiohttp around the sans-IO session: routes, connections, graceful shutdown."""
