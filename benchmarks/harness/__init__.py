"""Training and evaluating a network, as `cifar.py` and the measuring scripts beside this folder do."""
