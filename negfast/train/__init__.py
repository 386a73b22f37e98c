"""All stages of training. Called, this package is `negfast.api.train`."""

import sys

from negfast import CallablePackage

sys.modules[__name__].__class__ = CallablePackage
