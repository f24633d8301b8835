"""Other tools: this package as part of them, and their files read here. Nothing else of the package imports it, but the command line."""
