"""What a model's attention costs on given devices, for every strategy, and which one to take. Starts no JAX program."""
