"""`python -m kdcli`."""

from kdcli.cli import main

if __name__ == "__main__":
    main()
