"""trimtab steers open-weight language models at inference time.

The public names stand in __init__.pyi; each is loaded when it is asked for.
"""

import lazy_loader

__version__ = "0.1.0"
__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
