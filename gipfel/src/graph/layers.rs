//! Where points go on paper: rows by the longest way down to them, columns by what stands above.

use super::picture::Picture;

/// A point's row (0 is the top) and column.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Place {
    /// Row, from the top.
    pub row: usize,
    /// Column, from the left; between two columns for a point centred below several.
    pub column: f64,
}

/// The longest way from the top to each point.
fn rows(g: &Picture) -> Vec<usize> {
    let mut row = vec![0; g.points.len()];
    // The graph has no cycle, so that this ends after as many rounds as it is deep.
    for _ in 0..g.points.len() {
        let mut moved = false;
        for e in &g.edges {
            if row[e.child] <= row[e.parent] {
                row[e.child] = row[e.parent] + 1;
                moved = true;
            }
        }
        if !moved {
            break;
        }
    }
    row
}

/// A place for each point; no two in one row are nearer than one column.
pub fn arrange(g: &Picture) -> Vec<Place> {
    let (row, roots) = (rows(g), g.roots());
    let mut place: Vec<Place> = row.iter().map(|r| Place { row: *r, column: 0.0 }).collect();
    for r in 0..=row.iter().copied().max().unwrap_or(0) {
        let mut here: Vec<usize> = (0..row.len()).filter(|p| row[*p] == r).collect();
        let wish = |p: usize, place: &[Place]| {
            let above: Vec<f64> = g
                .edges
                .iter()
                .filter(|e| e.child == p)
                .map(|e| {
                    // Several children of one parent spread around it.
                    let siblings: Vec<_> = g.below(e.parent).map(|s| s.child).collect();
                    let at = siblings.iter().position(|s| *s == p).unwrap_or(0) as f64;
                    place[e.parent].column + at - (siblings.len() - 1) as f64 / 2.0
                })
                .collect();
            match above.len() {
                0 => roots.iter().position(|r| *r == p).unwrap_or(0) as f64,
                n => above.iter().sum::<f64>() / n as f64,
            }
        };
        let wishes: Vec<f64> = (0..row.len()).map(|p| wish(p, &place)).collect();
        here.sort_by(|a, b| wishes[*a].total_cmp(&wishes[*b]));
        let mut free = f64::NEG_INFINITY;
        for p in here {
            place[p].column = wishes[p].max(free);
            free = place[p].column + 1.0;
        }
    }
    let left = place.iter().map(|p| p.column).fold(f64::INFINITY, f64::min);
    place.iter_mut().for_each(|p| p.column -= left);
    place
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::{Value, json};

    #[test]
    fn nothing_overlaps_and_all_leads_down() {
        let kinds = ["backend", "backend", "node", "node", "node", "node"];
        let nodes = kinds
            .iter()
            .enumerate()
            .map(|(i, k)| json!({ "id": i, "kind": k, "name": format!("p{i}"), "driver": "x" }));
        let edges = [(0, 2), (1, 2), (2, 3), (2, 4), (1, 4), (4, 5)].map(|(p, c)| {
            json!({ "parent": p, "child": c, "name": "n", "label": "l", "binding": "position",
                    "perm": [] })
        });
        let v = json!({ "nodes": nodes.collect::<Value>(), "edges": edges });
        let g = Picture::read(&v).unwrap();
        let places = arrange(&g);
        for e in &g.edges {
            assert!(places[e.parent].row < places[e.child].row);
        }
        for (i, a) in places.iter().enumerate() {
            for b in &places[..i] {
                assert!(a.row != b.row || (a.column - b.column).abs() >= 1.0, "{a:?} {b:?}");
            }
        }
    }
}
