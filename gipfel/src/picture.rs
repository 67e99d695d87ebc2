//! The graph as text for a terminal, from what `x-debug-query-block-graph` answers.

use std::collections::{BTreeMap, BTreeSet};

use serde_json::Value;

/// Draws each client with what stands below it. A node that was drawn already is only named.
pub fn draw(graph: &Value) -> String {
    let list = |key: &str| graph[key].as_array().cloned().unwrap_or_default();
    let mut names = BTreeMap::new();
    let mut edges: BTreeMap<u64, Vec<(String, u64)>> = BTreeMap::new();
    let mut below = BTreeSet::new();
    for n in list("nodes") {
        let id = n["id"].as_u64().unwrap_or_default();
        let name = n["name"].as_str().unwrap_or_default().to_owned();
        let client = n["type"] != "block-driver";
        names.insert(id, if client { format!("[{name}]") } else { name });
    }
    for e in list("edges") {
        let (parent, child) = (e["parent"].as_u64(), e["child"].as_u64());
        let (Some(parent), Some(child)) = (parent, child) else { continue };
        let role = e["name"].as_str().unwrap_or_default().to_owned();
        edges.entry(parent).or_default().push((role, child));
        below.insert(child);
    }
    let mut out = String::new();
    let mut drawn = BTreeSet::new();
    // Clients first, then nodes that nobody stands on.
    let mut roots: Vec<_> = names.keys().copied().filter(|n| !below.contains(n)).collect();
    roots.sort_by_key(|n| !names[n].starts_with('['));
    for r in roots {
        out.push_str(&names[&r]);
        out.push('\n');
        drawn.insert(r);
        branch(r, "", &names, &edges, &mut drawn, &mut out);
    }
    out
}

fn branch(
    at: u64,
    indent: &str,
    names: &BTreeMap<u64, String>,
    edges: &BTreeMap<u64, Vec<(String, u64)>>,
    drawn: &mut BTreeSet<u64>,
    out: &mut String,
) {
    let Some(children) = edges.get(&at) else { return };
    // The longest branch, a backing chain, goes straight down: others come before it.
    let mut children = children.clone();
    children.sort_by_key(|(role, _)| role == "backing");
    for (i, (role, child)) in children.iter().enumerate() {
        let last = i + 1 == children.len();
        let straight = last && role == "backing";
        let (corner, more) = match (last, straight) {
            (true, true) => ("|\n", ""),
            (true, false) => ("`-- ", "    "),
            _ => ("|-- ", "|   "),
        };
        let name = names.get(child).map_or("?", String::as_str);
        let seen = if drawn.insert(*child) { "" } else { " (see above)" };
        if straight {
            out.push_str(&format!("{indent}{corner}{indent}{name}{seen}   ({role})\n"));
        } else {
            out.push_str(&format!("{indent}{corner}{name}{seen}   ({role})\n"));
        }
        if seen.is_empty() {
            branch(*child, &format!("{indent}{more}"), names, edges, drawn, out);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn a_chain_under_a_client() {
        let node = |id, name| json!({ "id": id, "type": "block-driver", "name": name });
        let edge = |p, c, n| json!({ "parent": p, "child": c, "name": n });
        let g = json!({
            "nodes": [node(1, "f0"), node(2, "n0"), node(3, "n1"),
                      { "id": 4, "type": "block-backend", "name": "export 'e'" }],
            "edges": [edge(2, 1, "file"), edge(4, 3, "root"), edge(3, 2, "backing")],
        });
        let want =
            "[export 'e']\n`-- n1   (root)\n    |\n    n0   (backing)\n    `-- f0   (file)\n";
        assert_eq!(draw(&g), want);
    }
}
