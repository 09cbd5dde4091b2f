"""The command line: one thin file per subcommand, each parses, calls one public function and prints."""
