"""The data layer: image-text pairs with two separate preferences, graded labels and a taxonomy. No torch in here."""

from beavertails_v.export import ExportError, write_beavertails_v
from beavertails_v.images import ImageError, ImageLimits, Picture
from beavertails_v.load import ComparisonSet, ResponseSet, load_comparisons, load_responses
from beavertails_v.quality import Audit, Leakage, audit, leakage
from beavertails_v.report import Dropped, LoadReport
from beavertails_v.schema import Comparison, LabelledResponse, Prompt, Response, SchemaError, Severity
from beavertails_v.sources import SourceError
from beavertails_v.taxonomy import Taxonomy, TaxonomyError

__all__ = [
    "Audit",
    "Comparison",
    "ComparisonSet",
    "Dropped",
    "ExportError",
    "ImageError",
    "ImageLimits",
    "LabelledResponse",
    "Leakage",
    "LoadReport",
    "Picture",
    "Prompt",
    "Response",
    "ResponseSet",
    "SchemaError",
    "Severity",
    "SourceError",
    "Taxonomy",
    "TaxonomyError",
    "audit",
    "leakage",
    "load_comparisons",
    "load_responses",
    "write_beavertails_v",
]
