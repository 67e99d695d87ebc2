//! The graph as SVG, without the help of another program.

use super::layers::{Place, arrange};
use super::picture::Picture;

const COLUMN: f64 = 190.0;
const ROW: f64 = 74.0;
const BOX: (f64, f64) = (164.0, 30.0);
const MARGIN: f64 = 24.0;
/// Room for a title above each graph.
const TITLE: f64 = 26.0;
/// Letters that fit into a box.
const LETTERS: usize = 24;

const STYLE: &str = "\
text{font:12px sans-serif;text-anchor:middle;fill:#222}\
.edge text{font-size:10px;text-anchor:start;fill:#555}\
rect{fill:#fff;stroke:#345;stroke-width:1.3}\
.backend rect{fill:#e8f0fb}\
.filter rect{fill:#fafafa;stroke-dasharray:5 3}\
path{fill:none;stroke:#678;stroke-width:1.2}\
.frozen path{stroke-width:3}\
.new rect{stroke:#c30;stroke-width:2.4}.new path{stroke:#c30;stroke-width:2}\
.title{font-size:14px;font-weight:bold}";

fn escaped(s: &str) -> String {
    s.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;").replace('"', "&quot;")
}

/// At most [`LETTERS`] letters, the middle left out.
fn short(s: &str) -> String {
    let letters: Vec<char> = s.chars().collect();
    if letters.len() <= LETTERS {
        return s.to_owned();
    }
    let half = LETTERS / 2 - 1;
    let (head, tail) = (&letters[..half], &letters[letters.len() - half..]);
    head.iter().chain(&['…']).chain(tail).collect()
}

struct Canvas {
    left: f64,
    out: String,
}

impl Canvas {
    /// The middle of a point's box.
    fn at(&self, p: Place) -> (f64, f64) {
        let x = self.left + MARGIN + BOX.0 / 2.0 + p.column * COLUMN;
        (x, MARGIN + TITLE + BOX.1 / 2.0 + p.row as f64 * ROW)
    }

    fn graph(&mut self, g: &Picture, other: &Picture, places: &[Place]) {
        let (names, lines) = (other.names(), other.lines());
        for e in &g.edges {
            let ((x1, y1), (x2, y2)) = (self.at(places[e.parent]), self.at(places[e.child]));
            let (y1, y2) = (y1 + BOX.1 / 2.0, y2 - BOX.1 / 2.0);
            let middle = (y1 + y2) / 2.0;
            // A label stands where no other edge ends: above the child unless that is shared.
            let shared = g.edges.iter().filter(|o| o.child == e.child).count() > 1;
            let (x, y) = if shared { (x1 + 6.0, y1 + 13.0) } else { (x2 + 6.0, y2 - 7.0) };
            let mut class = String::from("edge");
            if e.frozen.is_some() {
                class.push_str(" frozen");
            }
            if !lines.contains(&g.line(e)) {
                class.push_str(" new");
            }
            self.out.push_str(&format!(
                "<g class=\"{class}\"><title>{}</title><path d=\"M{x1:.0} {y1:.0} C{x1:.0} \
                 {middle:.0} {x2:.0} {middle:.0} {x2:.0} {y2:.0}\"/><text x=\"{x:.0}\" \
                 y=\"{y:.0}\">{}</text></g>\n",
                escaped(&g.line(e)),
                escaped(&e.text()),
            ));
        }
        for (p, place) in g.points.iter().zip(places) {
            let (x, y) = self.at(*place);
            let mut class = String::from(match (p.is_backend(), p.is_implicit()) {
                (true, _) => "backend",
                (_, true) => "filter",
                _ => "node",
            });
            if !names.contains(p.name.as_str()) {
                class.push_str(" new");
            }
            let round = if p.is_backend() { BOX.1 / 2.0 } else { 3.0 };
            self.out.push_str(&format!(
                "<g class=\"{class}\"><title>{}</title><rect x=\"{:.0}\" y=\"{:.0}\" \
                 width=\"{:.0}\" height=\"{:.0}\" rx=\"{round:.0}\"/><text x=\"{x:.0}\" \
                 y=\"{:.0}\">{}</text></g>\n",
                escaped(&p.name),
                x - BOX.0 / 2.0,
                y - BOX.1 / 2.0,
                BOX.0,
                BOX.1,
                y + 4.0,
                escaped(&short(&p.title())),
            ));
        }
    }
}

/// Draws graphs side by side: for each its title, itself, and the one it is compared with.
pub fn draw(graphs: &[(&str, &Picture, &Picture)]) -> String {
    let mut canvas = Canvas { left: 0.0, out: String::new() };
    let mut height: f64 = 0.0;
    for (title, g, other) in graphs {
        let places = arrange(g);
        let columns = places.iter().map(|p| p.column).fold(0.0, f64::max);
        let rows = places.iter().map(|p| p.row).max().unwrap_or(0);
        let width = 2.0 * MARGIN + BOX.0 + columns * COLUMN;
        canvas.out.push_str(&format!(
            "<text class=\"title\" x=\"{:.0}\" y=\"{:.0}\">{}</text>\n",
            canvas.left + width / 2.0,
            MARGIN,
            escaped(title)
        ));
        canvas.graph(g, other, &places);
        canvas.left += width + MARGIN;
        height = height.max(2.0 * MARGIN + TITLE + BOX.1 + rows as f64 * ROW);
    }
    format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" width=\"{0:.0}\" height=\"{height:.0}\" \
         viewBox=\"0 0 {0:.0} {height:.0}\">\n<style>{STYLE}</style>\n<rect width=\"100%\" \
         height=\"100%\" style=\"stroke:none\"/>\n{1}</svg>\n",
        canvas.left, canvas.out
    )
}
