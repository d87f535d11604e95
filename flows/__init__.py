"""What a person runs: the Prefect flows and their command line."""
