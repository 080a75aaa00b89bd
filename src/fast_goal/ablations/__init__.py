"""The paper's ablation tables, each in one command: `fast-goal ablate table=VI`.

A table is a file of conf/ablation: its arms with their settings, its rows and columns. Every arm is run with every seed as an
experiment in DVC's queue (`experiments`), which takes from the cache what arms have in common; the tables are made from
their reports (`results`). `study` puts it together.
"""
