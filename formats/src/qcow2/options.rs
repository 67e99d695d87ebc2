//! Runtime options (BlockdevOptionsQcow2 of the QMP reference), and what they mean for the caches.

use gipfel_base::{Error, Result};
use serde::Deserialize;
use serde_json::Value;

use super::geometry::Geometry;

/// L2 cache without any option, in bytes: enough for 256 GiB of disk in clusters of 64 KiB.
const L2_DEFAULT: u64 = 32 << 20;
/// Refcount cache without any option, in clusters.
const REFCOUNT_CLUSTERS: u64 = 4;
/// Size of a slice unless `l2-cache-entry-size` says otherwise, in bytes.
const SLICE: u64 = 4096;
/// Smallest slice, in bytes.
const MIN_SLICE: u64 = 512;
/// Largest cache that can be asked for, in bytes.
const MAX_CACHE: u64 = 1 << 40;

#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub(super) struct Options {
    lazy_refcounts: Option<bool>,
    pub(super) pass_discard_request: Option<bool>,
    pass_discard_snapshot: Option<bool>,
    pass_discard_other: Option<bool>,
    discard_no_unref: Option<bool>,
    overlap_check: Option<Value>,
    cache_size: Option<u64>,
    l2_cache_size: Option<u64>,
    l2_cache_entry_size: Option<u64>,
    refcount_cache_size: Option<u64>,
    cache_clean_interval: Option<u64>,
    encrypt: Option<Value>,
}

/// Sizes of the metadata caches, in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct CacheSizes {
    /// All L2 slices together.
    pub(super) l2: u64,
    /// One slice of L2 entries.
    pub(super) l2_slice: u64,
    /// All refcount slices together.
    pub(super) refcounts: u64,
    /// One slice of refcounts.
    pub(super) refcount_slice: u64,
}

impl Options {
    pub(super) fn parse(options: Value) -> Result<Options> {
        let o: Options = serde_json::from_value(options)
            .map_err(|e| Error::invalid(format!("options of format 'qcow2': {e}")))?;
        let refuse = |name: &str, set: bool| match set {
            true => Err(Error::unsupported(format!(
                "option '{name}' is not offered by this version of gipfel"
            ))),
            false => Ok(()),
        };
        refuse("encrypt", o.encrypt.is_some())?;
        refuse("discard-no-unref", o.discard_no_unref == Some(true))?;
        refuse("cache-clean-interval", o.cache_clean_interval.is_some_and(|s| s > 0))?;
        refuse("lazy-refcounts", o.lazy_refcounts == Some(true))?;
        refuse("pass-discard-other", o.pass_discard_other == Some(true))?;
        Ok(o)
    }

    /// Whether nothing but what can be changed at any time is different.
    pub(super) fn differs_in_discard_only(&self, other: &Options) -> bool {
        let fixed = |o: &Options| Options { pass_discard_request: None, ..o.clone() };
        fixed(self) == fixed(other)
    }

    /// How large the caches may be, for a disk of `size` bytes. The rules are those of the QMP
    /// reference: the total may be given, and one part of it.
    pub(super) fn caches(&self, g: Geometry, size: u64) -> Result<CacheSizes> {
        let cluster = g.cluster_size();
        let l2_slice = match self.l2_cache_entry_size {
            None => SLICE.min(cluster),
            Some(n) if n.is_power_of_two() && (MIN_SLICE..=cluster).contains(&n) => n,
            Some(n) => {
                return Err(Error::invalid(format!(
                    "option 'l2-cache-entry-size' is {n}, but must be a power of two from \
                     {MIN_SLICE} to the cluster size ({cluster})"
                )));
            }
        };
        for (name, v) in [
            ("cache-size", self.cache_size),
            ("l2-cache-size", self.l2_cache_size),
            ("refcount-cache-size", self.refcount_cache_size),
        ] {
            if v.is_some_and(|n| n > MAX_CACHE) {
                let text = format!("option '{name}' is more than {MAX_CACHE} bytes");
                return Err(Error::invalid(text));
            }
        }
        let least = REFCOUNT_CLUSTERS * cluster;
        let (l2, refcounts) = match (self.cache_size, self.l2_cache_size, self.refcount_cache_size)
        {
            (Some(_), Some(_), Some(_)) => {
                return Err(Error::invalid(
                    "give two of the options 'cache-size', 'l2-cache-size' and \
                         'refcount-cache-size' at most: the third follows from them",
                ));
            }
            (Some(all), Some(part), None) | (Some(all), None, Some(part)) if part > all => {
                return Err(Error::invalid(format!(
                    "option 'cache-size' is {all}, less than its part of {part} bytes"
                )));
            }
            (Some(all), Some(l2), None) => (l2, all - l2),
            (Some(all), None, Some(r)) => (all - r, r),
            (Some(all), None, None) => {
                let r = least.min(all / 2);
                (all - r, r)
            }
            (None, l2, r) => (l2.unwrap_or(L2_DEFAULT), r.unwrap_or(least)),
        };
        // More than the whole disk's entries would never be used.
        let whole = (g.l1_entries(size) << g.cluster_bits).max(l2_slice);
        Ok(CacheSizes {
            l2: l2.min(whole),
            l2_slice,
            refcounts,
            refcount_slice: SLICE.min(cluster),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    const G: Geometry = Geometry::new(16, 4);

    fn sizes(o: Value) -> Result<(u64, u64)> {
        let c = Options::parse(o)?.caches(G, 1 << 50)?;
        Ok((c.l2, c.refcounts))
    }

    #[test]
    fn cache_sizes_follow_from_each_other() {
        const MIB: u64 = 1 << 20;
        assert_eq!(sizes(json!({})).unwrap(), (32 * MIB, MIB / 4));
        assert_eq!(sizes(json!({"cache-size": 4 * MIB})).unwrap(), (15 * MIB / 4, MIB / 4));
        assert_eq!(
            sizes(json!({"cache-size": 4 * MIB, "refcount-cache-size": MIB})).unwrap(),
            (3 * MIB, MIB)
        );
        assert_eq!(sizes(json!({"l2-cache-size": MIB})).unwrap(), (MIB, MIB / 4));
        for bad in [
            json!({"cache-size": 1, "l2-cache-size": 2}),
            json!({"cache-size": 3, "l2-cache-size": 2, "refcount-cache-size": 1}),
            json!({"l2-cache-entry-size": 1000}),
            json!({"l2-cache-entry-size": 131_072}),
            json!({"l2-cache-size": u64::MAX}),
            json!({"encrypt": {}}),
            json!({"no-such": 1}),
        ] {
            assert!(sizes(bad.clone()).is_err(), "{bad}");
        }
        let small = Options::default().caches(G, 1 << 20).unwrap();
        assert_eq!(small.l2, 65536);
    }
}
