//! The graph as text: each client with what stands below it.

use std::collections::BTreeSet;

use super::picture::{Picture, Point};

/// How a point is written: `[backend]`, `(implicit filter)`, `node`.
fn written(p: &Point) -> String {
    match (p.is_backend(), p.is_implicit()) {
        (true, _) => format!("[{}]", p.title()),
        (_, true) => {
            let whose = p.owner.as_deref().map_or_else(String::new, |o| format!(" of {o}"));
            format!("({}{whose})", p.title())
        }
        _ => p.title(),
    }
}

/// Draws each client with what stands below it. A node that was drawn already is only named.
pub fn draw(g: &Picture) -> String {
    let mut out = String::new();
    let mut drawn = BTreeSet::new();
    // Clients first, then nodes that nobody stands on.
    for r in g.roots() {
        out.push_str(&written(&g.points[r]));
        out.push('\n');
        drawn.insert(r);
        branch(g, r, "", &mut drawn, &mut out);
    }
    out
}

fn branch(g: &Picture, at: usize, indent: &str, drawn: &mut BTreeSet<usize>, out: &mut String) {
    // The longest branch, a backing chain, goes straight down: others come before it.
    let below: Vec<_> = g.below(at).collect();
    for (i, e) in below.iter().enumerate() {
        let last = i + 1 == below.len();
        let straight = last && e.name == "backing";
        let (corner, more) = match (last, straight) {
            (_, true) => ("|\n", ""),
            (true, false) => ("`-- ", "    "),
            (false, false) => ("|-- ", "|   "),
        };
        let seen = if drawn.insert(e.child) { "" } else { " (see above)" };
        let lead = if straight { indent } else { "" };
        let name = written(&g.points[e.child]);
        out.push_str(&format!("{indent}{corner}{lead}{name}{seen}   {}\n", e.text()));
        if seen.is_empty() {
            branch(g, e.child, &format!("{indent}{more}"), drawn, out);
        }
    }
}

/// Before and after, and the edges and points that differ.
pub fn draw_change(before: &Picture, after: &Picture) -> String {
    let mut out = format!("before:\n{}\nafter:\n{}\n", draw(before), draw(after));
    let (old, new) = (before.lines(), after.lines());
    let (was, is) = (before.names(), after.names());
    let mut changes: Vec<String> = Vec::new();
    changes.extend(was.difference(&is).map(|n| format!("- {n}")));
    changes.extend(is.difference(&was).map(|n| format!("+ {n}")));
    changes.extend(old.difference(&new).map(|l| format!("- {l}")));
    changes.extend(new.difference(&old).map(|l| format!("+ {l}")));
    if changes.is_empty() {
        out.push_str("nothing changes\n");
    } else {
        out.push_str(&format!("changes:\n{}\n", changes.join("\n")));
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::{Value, json};

    fn picture(points: &[(&str, &str)], edges: &[(usize, usize, &str)]) -> Value {
        let nodes = points.iter().enumerate().map(|(i, (kind, name))| match *kind {
            "backend" => json!({ "id": i, "kind": kind, "name": "#b", "client": name }),
            _ => json!({ "id": i, "kind": "node", "name": name, "driver": kind, "size": 1 }),
        });
        let edges = edges.iter().map(|(p, c, n)| {
            json!({
                "parent": p, "child": c, "name": n, "label": format!("{}.{n}", points[*p].1),
                "binding": "position", "perm": ["consistent-read"], "shared-perm": [],
            })
        });
        json!({ "nodes": nodes.collect::<Value>(), "edges": edges.collect::<Value>() })
    }

    fn chain() -> Value {
        picture(
            &[("file", "f0"), ("qcow2", "n0"), ("qcow2", "n1"), ("backend", "export 'e'")],
            &[(1, 0, "file"), (3, 2, "root"), (2, 1, "backing")],
        )
    }

    #[test]
    fn a_chain_under_a_client() {
        let want = "[export 'e']\n`-- n1 (qcow2)   root r\n    |\n    n0 (qcow2)   backing r\n    \
                    `-- f0 (file)   file r\n";
        assert_eq!(draw(&Picture::read(&chain()).unwrap()), want);
    }

    #[test]
    fn a_change_is_told() {
        let before = Picture::read(&chain()).unwrap();
        let mut v = chain();
        v["edges"][1]["child"] = json!(1);
        let after = Picture::read(&v).unwrap();
        let text = draw_change(&before, &after);
        assert!(text.ends_with("changes:\n- export 'e'.root -> n1\n+ export 'e'.root -> n0\n"));
        assert!(draw_change(&before, &before).ends_with("nothing changes\n"));
    }
}
