"""`python -m nasattn`: the command `nasattn`."""

from nasattn.cli import main

main()
