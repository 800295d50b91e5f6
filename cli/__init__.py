"""The `ddetr` command."""
