"""One module a verb of the command line, each with FLAGS and `run(positional)`."""
