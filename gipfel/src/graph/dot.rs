//! The graph as DOT, for graphviz.

use super::picture::Picture;

fn quoted(s: &str) -> String {
    format!("\"{}\"", s.replace('\\', "\\\\").replace('"', "\\\""))
}

/// Draws graphs side by side: for each its title, itself, and the one it is compared with.
pub fn draw(graphs: &[(&str, &Picture, &Picture)]) -> String {
    let mut out = String::from(
        "digraph gipfel {\n  node [shape=box, fontname=\"sans-serif\", fontsize=11];\n  edge \
         [fontname=\"sans-serif\", fontsize=9];\n",
    );
    for (i, (title, g, other)) in graphs.iter().enumerate() {
        out.push_str(&format!("  subgraph cluster_{i} {{\n    label={};\n", quoted(title)));
        let (names, lines) = (other.names(), other.lines());
        for (n, p) in g.points.iter().enumerate() {
            let style = match (p.is_backend(), p.is_implicit()) {
                (true, _) => "shape=oval",
                (_, true) => "style=dashed",
                _ => "style=solid",
            };
            let mark = if names.contains(p.name.as_str()) { "" } else { ", color=red" };
            let title = quoted(&p.title());
            out.push_str(&format!("    g{i}_{n} [label={title}, {style}{mark}];\n"));
        }
        for e in &g.edges {
            let mark = if lines.contains(&g.line(e)) { "" } else { ", color=red" };
            let frozen = if e.frozen.is_some() { ", style=bold" } else { "" };
            let label = quoted(&e.text());
            let (p, c) = (e.parent, e.child);
            out.push_str(&format!("    g{i}_{p} -> g{i}_{c} [label={label}{mark}{frozen}];\n"));
        }
        out.push_str("  }\n");
    }
    out.push_str("}\n");
    out
}
