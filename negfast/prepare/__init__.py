"""From event files to a prepared data set. Called, this package is `negfast.api.prepare`."""

import sys

from negfast import CallablePackage

sys.modules[__name__].__class__ = CallablePackage
