"""Models: names to networks, weights and cards, what is read from a network, the zoo's CIFAR networks (`cifar`)."""
