"""The `bridge` command: thin over the library, one module a command."""
