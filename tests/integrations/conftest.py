"""transformers has to be importable beside a CPU build of torch."""

from videoanchor_triton.integrations.torchvision_compat import make_torchvision_importable

make_torchvision_importable()
