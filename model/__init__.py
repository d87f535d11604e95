"""The Llama model, its data order and its trainer: pure JAX and numpy, never Prefect."""
