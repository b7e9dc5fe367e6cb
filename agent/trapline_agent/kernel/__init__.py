"""The only raw system calls. Each module names the man page or kernel file its facts come from."""
