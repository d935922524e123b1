"""Constants of the network's interface. Importing this file needs neither torch nor transformers."""

IGNORE_INDEX = -100  # in labels: nothing is predicted at this position (PyTorch's and Hugging Face's convention)
