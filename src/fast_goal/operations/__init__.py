"""What is done with models beside the pipeline: judge, promote, roll back, watch, compare, serve. One module per command."""
