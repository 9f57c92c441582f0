"""Models: names to networks, their weights and cards, what is read of a network, the zoo's CIFAR networks (`cifar`)."""
