use super::*;

fn text(path: &str) -> &'static str {
    ASSETS.iter().find(|asset| asset.path == path).unwrap().text
}

/// Pieces of `text` that stand between `before` and the next double quote.
fn quoted<'a>(text: &'a str, before: &'a str) -> impl Iterator<Item = &'a str> {
    text.split(before).skip(1).map(|rest| rest.split('"').next().unwrap_or_default())
}

#[test]
fn nothing_is_loaded_from_elsewhere_and_all_that_is_referred_to_is_there() {
    let is_there = |path: &str| ASSETS.iter().any(|asset| asset.path == path);
    let mut referred = 0;
    for asset in &ASSETS {
        // The name of SVG's elements, which nobody asks for.
        let rest = asset.text.replace("http://www.w3.org/2000/svg", "");
        for bad in ["http:", "https:", "url(", "@import", "\"//"] {
            assert!(!rest.contains(bad), "{} has {bad}", asset.path);
        }
        for name in quoted(asset.text, "from \"./") {
            referred += 1;
            assert!(is_there(&format!("/console/{name}")), "{} imports {name}", asset.path);
        }
    }
    let page = text("/");
    for path in quoted(page, "src=\"").chain(quoted(page, "href=\"")) {
        if path.starts_with("/console") {
            referred += 1;
            assert!(is_there(path), "the page refers to {path}");
        }
    }
    assert!(referred > ASSETS.len(), "{referred}");
}

#[test]
fn text_never_becomes_markup_or_a_script() {
    for asset in &ASSETS {
        for bad in [
            "innerHTML",
            "outerHTML",
            "insertAdjacentHTML",
            "document.write",
            "createContextualFragment",
            "DOMParser",
            "setHTML",
            "srcdoc",
            "eval(",
            "new Function",
            "javascript:",
        ] {
            assert!(!asset.text.contains(bad), "{} uses {bad}", asset.path);
        }
    }
    let page = text("/");
    for bad in [" onclick", " onload", " onerror", " style=", "<style", "<script>"] {
        assert!(!page.contains(bad), "the page has {bad}");
    }
}

#[test]
fn only_reads_of_known_paths_are_answered() {
    assert!(find("GET", "/").is_some());
    assert!(find("HEAD", "/console/main.js").is_some());
    for (method, path) in [
        ("POST", "/"),
        ("GET", "/console"),
        ("GET", "/console/"),
        ("GET", "/console/mod.rs"),
        ("GET", "/console/../../control.rs"),
        ("GET", "//"),
    ] {
        assert!(find(method, path).is_none(), "{method} {path}");
    }
}

#[test]
fn the_policy_keeps_the_page_to_itself() {
    let mut headers = HeaderMap::new();
    protect(&mut headers);
    let policy = headers[CONTENT_SECURITY_POLICY].to_str().unwrap();
    for rule in ["default-src 'none'", "frame-ancestors 'none'", "script-src 'self'"] {
        assert!(policy.split("; ").any(|one| one == rule), "{policy}");
    }
    assert!(!policy.contains("unsafe"), "{policy}");
    assert_eq!(headers[X_CONTENT_TYPE_OPTIONS], "nosniff");
    assert_eq!(headers[REFERRER_POLICY], "no-referrer");
}
