//! What the tests share: an NBD client, scratch folders, the reference tools.
