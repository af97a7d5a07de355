"""Images: data sets, decoding, network input, augmentation, statistics."""

from fpt_fast.images.augmentation import SideAugmentation
from fpt_fast.images.batches import iter_image_batches
from fpt_fast.images.csv_list import ImageSetError
from fpt_fast.images.dataset import EXTENSIONS, list_images, load_image_set
from fpt_fast.images.decode import ImageError, read_image, read_item
from fpt_fast.images.dicom import has_dicom_name
from fpt_fast.images.digests import digest_images
from fpt_fast.images.draws import AugmentationDraw, AugmentationDraws, choose, hashed_uniform, mix
from fpt_fast.images.labels import labels_of, sampling_weights
from fpt_fast.images.presets import DatasetPreset, dataset_preset, preset_names
from fpt_fast.images.side_batches import SideBatches
from fpt_fast.images.side_images import SideImages, shrink_images
from fpt_fast.images.statistics import check_images, format_unreadable, measure_statistics
from fpt_fast.images.store import DecodedStore
from fpt_fast.images.transforms import fit_image, to_network_input
from fpt_fast.images.values import value_scale
from fpt_fast.images.windows import parse_window

__all__ = [
    "EXTENSIONS",
    "AugmentationDraw",
    "AugmentationDraws",
    "DatasetPreset",
    "DecodedStore",
    "ImageError",
    "ImageSetError",
    "SideAugmentation",
    "SideBatches",
    "SideImages",
    "check_images",
    "choose",
    "dataset_preset",
    "digest_images",
    "fit_image",
    "format_unreadable",
    "has_dicom_name",
    "hashed_uniform",
    "iter_image_batches",
    "labels_of",
    "list_images",
    "load_image_set",
    "measure_statistics",
    "mix",
    "parse_window",
    "preset_names",
    "read_image",
    "read_item",
    "sampling_weights",
    "shrink_images",
    "to_network_input",
    "value_scale",
]
