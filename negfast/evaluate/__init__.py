"""What a run is worth: metrics, baselines, tables. Called, this package is `negfast.api.evaluate`."""

import sys

from negfast import CallablePackage

sys.modules[__name__].__class__ = CallablePackage
