"""`python -m streamkv`."""

from streamkv.cli import main

raise SystemExit(main())
