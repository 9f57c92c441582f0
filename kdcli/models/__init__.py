"""Networks: names to modules, weights and cards, what is read of a network, the zoo's own (`cifar`)."""
