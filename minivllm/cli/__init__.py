"""The command line: options reflected from config, one file a command."""
