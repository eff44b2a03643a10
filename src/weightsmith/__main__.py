"""``python -m weightsmith``."""

from weightsmith.cli.main import main

main()
