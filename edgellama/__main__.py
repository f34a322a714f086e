"""`python -m edgellama`: the command line."""

from edgellama.cli.main import main

if __name__ == "__main__":
    main()
