//! Who may do what with an API that asks for no credentials.

use std::fs;
use std::os::unix::process::CommandExt;
use std::process::Command;

use replicator_tests::mounts::FileSystem::Ext4;
use replicator_tests::process::run_to_end;
use replicator_tests::scenario::{Layout, Pair, patience};

/// Prints the status of the answer to one request.
const ASK: &str = "
import sys, urllib.error, urllib.request
body = sys.argv[2].encode() if len(sys.argv) > 2 else None
request = urllib.request.Request(sys.argv[1], data=body, headers={'Content-Type': 'application/json'})
try:
    print(urllib.request.urlopen(request).status)
except urllib.error.HTTPError as error:
    print(error.code, error.headers['x-amzn-errortype'])
";

/// A user who is neither root nor the daemon's may look; else he could have root's
/// daemon copy any file to him, or write any.
#[test]
fn another_user_of_the_host_may_look_and_change_nothing() {
    let pair = Pair::alone(Layout::Two(Ext4, Ext4));
    let daemon = pair.start_enabled("fanotify");
    let ask = |uid: u32, path: &str, body: Option<&str>| {
        let mut command = Command::new("python3");
        command.args(["-c", ASK, &format!("{}{path}", daemon.endpoint())]).args(body);
        command.uid(uid).gid(uid).current_dir("/");
        run_to_end(command, patience()).success().stdout.trim().to_owned()
    };
    let (root, nobody) = (0, 65_534);
    assert_eq!(ask(nobody, "/replicator/v1/status", None), "200");
    assert_eq!(ask(nobody, "/metrics", None), "200");
    let refused = "403 AccessDeniedException";
    for (path, body) in [
        ("/replicator/v1/pause", "{}"),
        ("/replicator/v1/failover", "{}"),
        ("/replicator/v1/tokens", r#"{"replica":"/etc/cron.d","reconcile":true}"#),
        ("/replicator/v1/replications", r#"{"source":"/etc","token":"x"}"#),
        ("/2015-02-01/file-systems", r#"{"CreationToken":"x"}"#),
    ] {
        assert_eq!(ask(nobody, path, Some(body)), refused, "{path}");
    }
    assert_eq!(ask(root, "/replicator/v1/pause", Some("{}")), "200");
    assert_eq!(ask(root, "/replicator/v1/resume", Some("{}")), "200");
    fs::write(pair.source().join("file"), "content").unwrap();
    pair.settle(&daemon, &"in the end");
}
