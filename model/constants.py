"""Constants of the network's interface. Importing this file needs neither torch nor transformers."""

MODES = ("coarse", "fine", "autoregressive")  # of the frames' encoding, see modeling_foveated_vlm.py
IGNORE_INDEX = -100  # in labels: nothing is predicted at this position (PyTorch's and Hugging Face's convention)
