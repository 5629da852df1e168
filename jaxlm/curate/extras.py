"""Modules of the optional extra `curate`: datatrove alone takes seconds to import."""

from functools import partial

from jaxlm.core.extras import extra as any_extra

extra = partial(any_extra, name="curate")
