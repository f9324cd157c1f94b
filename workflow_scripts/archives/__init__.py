"""Zips, tars and folders of images, listed once and then read by offset; nothing is ever extracted."""

from workflow_scripts.archives.listing import (
    Listing,
    Note,
    StoreType,
    detect_type,
    list_members,
    listing_identity,
    store_size,
)
from workflow_scripts.archives.reading import DamagedMember, StoreReader, TooLargeMember

__all__ = [
    "DamagedMember",
    "Listing",
    "Note",
    "StoreReader",
    "StoreType",
    "TooLargeMember",
    "detect_type",
    "list_members",
    "listing_identity",
    "store_size",
]
