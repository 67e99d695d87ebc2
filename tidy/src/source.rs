//! Rust source as the rules look at it: what is code, what is comment, string or test.
//!
//! A small lexer, not a parser: it knows comments (nested), strings (raw, byte and plain), char
//! literals and lifetimes, and finds items under `#[cfg(test)]` by their braces. It does not
//! expand macros and does not resolve names. Lexical rules: The Rust Reference, "Tokens",
//! "Comments", "Conditional compilation".

/// One file of the project, relative to the root of the repository.
pub struct Source {
    /// Path with `/` between its parts, as in `graph/src/lib.rs`.
    pub path: String,
    /// The file as it is.
    pub text: String,
    /// For Rust: the text with comments, and contents of strings, blanked; same line breaks.
    pub code: String,
    /// For Rust: the text with comments blanked; strings stay.
    pub code_and_strings: String,
    /// For Rust: whether each line belongs to tests.
    pub test_line: Vec<bool>,
}

impl Source {
    /// Takes `text` apart if `path` is a Rust file; other files keep their text as code.
    pub fn new(path: &str, text: &str) -> Self {
        let rust = path.ends_with(".rs");
        let (code, code_and_strings) =
            if rust { blank(text) } else { (text.to_string(), text.to_string()) };
        let mut test_line = vec![is_test_file(path); text.lines().count()];
        if rust {
            mark_test_items(&code, &mut test_line);
        }
        Self { path: path.to_string(), text: text.to_string(), code, code_and_strings, test_line }
    }

    /// The first folder of the path: the crate's folder, or the file's own name.
    pub fn top(&self) -> &str {
        self.path.split('/').next().unwrap_or(&self.path)
    }

    /// Whether it is Rust source.
    pub fn is_rust(&self) -> bool {
        self.path.ends_with(".rs")
    }

    /// Code lines that are not tests: line number from 1, and the line.
    pub fn product_code(&self) -> impl Iterator<Item = (usize, &str)> {
        self.code
            .lines()
            .enumerate()
            .filter(|(i, _)| !self.test_line.get(*i).copied().unwrap_or(false))
            .map(|(i, l)| (i + 1, l))
    }

    /// As [`Source::product_code`], with the contents of strings.
    pub fn product_code_and_strings(&self) -> impl Iterator<Item = (usize, &str)> {
        self.code_and_strings
            .lines()
            .enumerate()
            .filter(|(i, _)| !self.test_line.get(*i).copied().unwrap_or(false))
            .map(|(i, l)| (i + 1, l))
    }
}

/// Whether the whole file is tests: under `tests/`, or a module file named for tests.
pub fn is_test_file(path: &str) -> bool {
    path.split('/').any(|p| p == "tests" || p == "tests.rs")
        || path.ends_with("_tests.rs")
        || path.ends_with("/test.rs")
}

/// The words (identifiers) of a piece of code.
pub fn words(code: &str) -> impl Iterator<Item = &str> {
    code.split(|c: char| !(c.is_alphanumeric() || c == '_')).filter(|w| !w.is_empty())
}

/// Full paths that the `use` items of `code` name, with the line of each: groups are written out.
pub fn used_paths(source: &Source) -> Vec<(usize, String)> {
    let mut found = Vec::new();
    let mut open: Option<(usize, String)> = None;
    for (line, text) in source.product_code() {
        let text = text.trim();
        if open.is_none() {
            let item = text.find("use ").filter(|at| {
                let before = text[..*at].trim();
                before.is_empty() || before.starts_with("pub")
            });
            if let Some(at) = item {
                open = Some((line, text[at + 4..].to_string()));
            }
        } else if let Some((_, s)) = &mut open {
            s.push_str(text);
        }
        if open.as_ref().is_some_and(|(_, s)| s.contains(';'))
            && let Some((line, s)) = open.take()
        {
            let tree = s.split(';').next().unwrap_or("").replace(' ', "");
            expand("", &tree, &mut |p| found.push((line, p)));
        }
    }
    found
}

/// Writes out one `use` tree: `a::{b, c::d}` gives `a::b` and `a::c::d`.
fn expand(prefix: &str, tree: &str, out: &mut dyn FnMut(String)) {
    let Some(open) = tree.find('{') else {
        if !tree.is_empty() {
            out(format!("{prefix}{tree}"));
        }
        return;
    };
    let prefix = format!("{prefix}{}", &tree[..open]);
    let inner = tree[open + 1..].strip_suffix('}').unwrap_or(&tree[open + 1..]);
    let (mut depth, mut from) = (0usize, 0);
    for (i, c) in inner.char_indices() {
        match c {
            '{' => depth += 1,
            '}' => depth = depth.saturating_sub(1),
            ',' if depth == 0 => {
                expand(&prefix, &inner[from..i], out);
                from = i + 1;
            }
            _ => {}
        }
    }
    expand(&prefix, &inner[from..], out);
}

/// Blanks comments, and in the first of the two results the contents of strings as well.
fn blank(text: &str) -> (String, String) {
    let c: Vec<char> = text.chars().collect();
    let (mut bare, mut with) = (String::with_capacity(text.len()), String::new());
    let mut i = 0;
    let both = |a: &mut String, b: &mut String, ch: char| {
        a.push(ch);
        b.push(ch);
    };
    let hide = |ch: char| if ch == '\n' { '\n' } else { ' ' };
    while i < c.len() {
        let next = c.get(i + 1).copied();
        match c[i] {
            '/' if next == Some('/') => {
                while i < c.len() && c[i] != '\n' {
                    both(&mut bare, &mut with, ' ');
                    i += 1;
                }
            }
            '/' if next == Some('*') => {
                let end = block_comment_end(&c, i);
                for ch in &c[i..end] {
                    both(&mut bare, &mut with, hide(*ch));
                }
                i = end;
            }
            'r' if !ends_a_word(&bare) && raw_string(&c, i).is_some() => {
                let end = raw_string(&c, i).unwrap_or(i + 1);
                for ch in &c[i..end] {
                    bare.push(hide(*ch));
                    with.push(*ch);
                }
                i = end;
            }
            '"' => {
                let end = string_end(&c, i);
                for (k, ch) in c[i..end].iter().enumerate() {
                    let quote = k == 0 || i + k + 1 == end;
                    bare.push(if quote { '"' } else { hide(*ch) });
                    with.push(*ch);
                }
                i = end;
            }
            '\'' => {
                let end = char_end(&c, i).unwrap_or(i + 1);
                for ch in &c[i..end] {
                    bare.push(if end > i + 1 { hide(*ch) } else { *ch });
                    with.push(*ch);
                }
                i = end;
            }
            ch => {
                both(&mut bare, &mut with, ch);
                i += 1;
            }
        }
    }
    (bare, with)
}

/// Whether what was written last is part of a word other than the `b` or `c` of a string prefix.
fn ends_a_word(bare: &str) -> bool {
    let mut back = bare.chars().rev();
    match back.next() {
        Some('b' | 'c') => back.next().is_some_and(|c| c.is_alphanumeric() || c == '_'),
        Some(c) => c.is_alphanumeric() || c == '_',
        None => false,
    }
}

fn block_comment_end(c: &[char], from: usize) -> usize {
    let (mut i, mut depth) = (from, 0);
    while i < c.len() {
        match (c[i], c.get(i + 1)) {
            ('/', Some('*')) => {
                depth += 1;
                i += 2;
            }
            ('*', Some('/')) => {
                depth -= 1;
                i += 2;
                if depth == 0 {
                    return i;
                }
            }
            _ => i += 1,
        }
    }
    c.len()
}

fn string_end(c: &[char], from: usize) -> usize {
    let mut i = from + 1;
    while i < c.len() {
        match c[i] {
            '\\' => i += 2,
            '"' => return i + 1,
            _ => i += 1,
        }
    }
    c.len()
}

/// The end of the raw string that starts at `from` (at its `r`), if one does.
fn raw_string(c: &[char], from: usize) -> Option<usize> {
    let mut i = from + 1;
    while c.get(i) == Some(&'#') {
        i += 1;
    }
    let hashes = i - from - 1;
    if c.get(i) != Some(&'"') {
        return None;
    }
    i += 1;
    while i < c.len() {
        let closes =
            c[i] == '"' && c[i + 1..].iter().take(hashes).filter(|h| **h == '#').count() == hashes;
        if closes {
            return Some(i + 1 + hashes);
        }
        i += 1;
    }
    Some(c.len())
}

/// The end of the char literal that starts at `from`; `None` where it is a lifetime.
fn char_end(c: &[char], from: usize) -> Option<usize> {
    if c.get(from + 1) == Some(&'\\') {
        let mut i = from + 3;
        while i < c.len() && c[i] != '\'' && c[i] != '\n' {
            i += 1;
        }
        return (c.get(i) == Some(&'\'')).then_some(i + 1);
    }
    (c.get(from + 2) == Some(&'\'')).then_some(from + 3)
}

/// Marks the lines of items under `#[cfg(test)]` (or `cfg(all(test, ...))`).
fn mark_test_items(code: &str, test_line: &mut [bool]) {
    let lines: Vec<&str> = code.lines().collect();
    let mut i = 0;
    while i < lines.len() {
        let l = lines[i].trim();
        let attribute = l.strip_prefix("#[cfg(").or_else(|| l.strip_prefix("#[cfg(all("));
        if !attribute.is_some_and(|a| words(a).any(|w| w == "test") && !a.contains("not(test")) {
            i += 1;
            continue;
        }
        let end = item_end(&lines, i);
        for t in test_line.iter_mut().take(end + 1).skip(i) {
            *t = true;
        }
        i = end + 1;
    }
}

/// The last line of the item whose attribute stands on line `from`.
fn item_end(lines: &[&str], from: usize) -> usize {
    let (mut depth, mut opened) = (0usize, false);
    for (i, line) in lines.iter().enumerate().skip(from) {
        let rest = if i == from { line.split_once(")]").map_or("", |(_, r)| r) } else { line };
        for ch in rest.chars() {
            match ch {
                '{' => {
                    depth += 1;
                    opened = true;
                }
                '}' => depth = depth.saturating_sub(1),
                ';' if !opened => return i,
                _ => {}
            }
        }
        if opened && depth == 0 {
            return i;
        }
    }
    lines.len().saturating_sub(1)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn comments_and_strings_are_no_code() {
        let s = Source::new(
            "x/src/a.rs",
            "let a = \"unsafe\"; // unsafe\n\
             /* unsafe /* unsafe */ unsafe */ let b = r#\"unsafe \" \"#;\n\
             let c = '\"'; let d = b\"unsafe\"; fn f<'a>(x: &'a str) {}\n",
        );
        assert!(!words(&s.code).any(|w| w == "unsafe"), "{}", s.code);
        assert_eq!(s.code_and_strings.matches("unsafe").count(), 3);
        for w in ["let", "a", "b", "c", "d", "str"] {
            assert!(words(&s.code).any(|x| x == w), "{w} in {}", s.code);
        }
    }

    #[test]
    fn a_lifetime_does_not_swallow_code() {
        let s =
            Source::new("x/src/a.rs", "fn f<'a>(x: &'a str) { unsafe {} }\nconst C: char = '\\n';");
        assert!(words(&s.code).any(|w| w == "unsafe"));
        assert!(words(&s.code).any(|w| w == "const"));
    }

    #[test]
    fn test_items_are_marked_to_their_closing_brace() {
        let s = Source::new(
            "x/src/a.rs",
            "use a;\n#[cfg(test)]\nmod tests {\n  fn f() { if x { } }\n}\nfn g() {}\n\
             #[cfg(test)]\nmod more;\nfn h() {}\n#[cfg(not(test))]\nfn i() {}\n",
        );
        let product: Vec<usize> = s.product_code().map(|(n, _)| n).collect();
        assert_eq!(product, [1, 6, 9, 10, 11]);
        assert!(is_test_file("io/tests/all.rs") && is_test_file("formats/src/qcow2/tests.rs"));
        assert!(!is_test_file("testkit/src/lib.rs"));
    }

    #[test]
    fn use_trees_are_written_out() {
        let s = Source::new(
            "x/src/a.rs",
            "pub(crate) use std::{\n    fs::{self, File},\n    time::Duration,\n};\nuse a::b;\n",
        );
        let p: Vec<String> = used_paths(&s).into_iter().map(|(_, p)| p).collect();
        assert_eq!(p, ["std::fs::self", "std::fs::File", "std::time::Duration", "a::b"]);
    }
}
