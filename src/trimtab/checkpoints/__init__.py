"""Where weights come from: packs, GGUF files, directories.

The names stand in __init__.pyi; each is loaded when it is asked for, so that packs can be listed
without PyTorch.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
