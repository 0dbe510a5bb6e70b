"""The command line: one small module a subcommand, and the options that several share."""
