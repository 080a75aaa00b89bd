"""Whether a candidate may replace the champion: measured on one test set, decided by the section `gate` of params.yaml."""
