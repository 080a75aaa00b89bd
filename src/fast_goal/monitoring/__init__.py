"""How far data and models have moved from what they were."""
