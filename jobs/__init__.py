"""How a model is made: data, training, compression, search, evaluation, registry."""
