//! Whose a loopback connection is: the kernel tells the user of each socket of the
//! host in `/proc/net`.

use std::fmt::Write;
use std::net::{IpAddr, Ipv6Addr, SocketAddr};

/// Whether the other end of a connection from `peer` to `own` is held by root, by the
/// user that this process runs as, or by who started it with `sudo`: he has shown that
/// he may. Also no when that cannot be told.
pub fn is_trusted(peer: SocketAddr, own: SocketAddr) -> bool {
    let ours = rustix::process::geteuid().as_raw();
    let caller = std::env::var("SUDO_UID").ok().and_then(|uid| uid.parse().ok());
    let uid = owner(peer, own);
    uid.is_some_and(|uid| uid == 0 || uid == ours || Some(uid) == caller)
}

/// How often a row is looked for. It may be passed over when its neighbour goes while
/// the table is read: on a host whose connections come and go all the time, some reads
/// of a hundred.
const TRIES: u32 = 5;

fn owner(peer: SocketAddr, own: SocketAddr) -> Option<u32> {
    (0..TRIES).find_map(|_| uid_of(peer, own))
}

fn uid_of(peer: SocketAddr, own: SocketAddr) -> Option<u32> {
    let tables = [("/proc/net/tcp", false), ("/proc/net/tcp6", true)];
    tables.into_iter().find_map(|(table, wide)| {
        let ends = (written(peer, wide)?, written(own, wide)?);
        find(&std::fs::read_to_string(table).ok()?, &ends)
    })
}

/// The user in the row of a socket from one end to the other.
///
/// INVARIANT: a socket that its process has closed is nobody's: it stands there with
/// inode 0 and user 0, which is not root.
fn find(table: &str, ends: &(String, String)) -> Option<u32> {
    table.lines().find_map(|row| {
        let fields: Vec<&str> = row.split_ascii_whitespace().collect();
        let [_, from, to, _, _, _, _, uid, _, inode, ..] = fields[..] else { return None };
        ((from, to) == (ends.0.as_str(), ends.1.as_str()) && inode != "0")
            .then(|| uid.parse().ok())
            .flatten()
    })
}

/// An address as a table has it: words of the host's byte order, in hexadecimal.
/// `None` when it cannot stand in it.
fn written(address: SocketAddr, wide: bool) -> Option<String> {
    let mut text = String::new();
    let mut word = |bytes: [u8; 4]| {
        // Writing to a string cannot fail.
        let _ = write!(text, "{:08X}", u32::from_ne_bytes(bytes));
    };
    match (address.ip().to_canonical(), wide) {
        (IpAddr::V4(ip), false) => word(ip.octets()),
        (IpAddr::V4(ip), true) => words(ip.to_ipv6_mapped()).into_iter().for_each(word),
        (IpAddr::V6(ip), true) => words(ip).into_iter().for_each(word),
        (IpAddr::V6(_), false) => return None,
    }
    let _ = write!(text, ":{:04X}", address.port());
    Some(text)
}

fn words(ip: Ipv6Addr) -> [[u8; 4]; 4] {
    let mut words = [[0; 4]; 4];
    words.as_flattened_mut().copy_from_slice(&ip.octets());
    words
}

#[cfg(test)]
mod tests {
    use std::net::{Ipv4Addr, TcpListener, TcpStream};

    use super::*;

    #[test]
    fn an_open_socket_is_its_users_and_a_closed_one_nobodys() {
        for ip in [IpAddr::from(Ipv4Addr::LOCALHOST), Ipv6Addr::LOCALHOST.into()] {
            // A host may be without IPv6.
            let Ok(listener) = TcpListener::bind((ip, 0)) else { continue };
            let own = listener.local_addr().unwrap();
            let client = TcpStream::connect(own).unwrap();
            let (served, peer) = listener.accept().unwrap();
            assert_eq!(owner(peer, own), Some(rustix::process::geteuid().as_raw()), "{ip}");
            assert!(is_trusted(peer, own));
            // The other direction is this process's too, and no other is there.
            assert_eq!(owner(SocketAddr::new(ip, peer.port() ^ 1), own), None);
            drop(client);
            assert_eq!(owner(peer, own), None, "{ip}");
            drop(served);
        }
    }

    #[test]
    fn a_row_without_a_process_is_not_roots() {
        let table = "  sl  local_address rem_address   st tx_queue rx_queue tr tm->when retrnsmt   uid  timeout inode\n\
            \x20  0: 0100007F:1181 0100007F:A000 01 00000000:00000000 00:00000000 00000000  1000        0 77 1 0\n\
            \x20  1: 0100007F:A000 0100007F:1181 05 00000000:00000000 00:00000000 00000000     0        0 0 1 0\n";
        let ends = |from: &str, to: &str| (from.to_owned(), to.to_owned());
        assert_eq!(find(table, &ends("0100007F:1181", "0100007F:A000")), Some(1000));
        assert_eq!(find(table, &ends("0100007F:A000", "0100007F:1181")), None);
    }
}
