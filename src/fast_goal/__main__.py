"""`python -m fast_goal` is `fast-goal`."""

from fast_goal.cli import main

main()
