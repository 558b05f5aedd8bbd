//! Connections of a namespace, from `/proc/net/tcp`: how many are captured, how many are older than the capture.

use super::model::{DNS_PORT, HBONE_PORT, INBOUND_PORT, OUTBOUND_PORT};

/// One row of the kernel's table.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Row {
    pub local_port: u16,
    pub remote_port: u16,
    pub local_is_loopback: bool,
    pub state: u8,
}

const TIME_WAIT: u8 = 6;
const CLOSE: u8 = 7;
const LISTEN: u8 = 10;

impl Row {
    fn is_open(self) -> bool {
        ![TIME_WAIT, CLOSE, LISTEN].contains(&self.state)
    }

    /// One of ztunnel's sockets that accepted a captured connection or a tunnel.
    pub fn is_captured(self) -> bool {
        self.is_open() && [OUTBOUND_PORT, INBOUND_PORT, HBONE_PORT, DNS_PORT].contains(&self.local_port)
    }

    /// A connection with the world that ztunnel has no part in.
    pub fn is_foreign(self) -> bool {
        self.is_open() && !self.local_is_loopback && !self.is_captured()
    }
}

/// The rows of `/proc/net/tcp` or `tcp6`; lines that do not read are skipped.
pub fn parse(table: &str) -> impl Iterator<Item = Row> {
    table.lines().skip(1).filter_map(row)
}

fn row(line: &str) -> Option<Row> {
    let mut fields = line.split_whitespace().skip(1);
    let (local, remote, state) = (fields.next()?, fields.next()?, fields.next()?);
    let (address, port) = local.split_once(':')?;
    Some(Row {
        local_port: u16::from_str_radix(port, 16).ok()?,
        remote_port: u16::from_str_radix(remote.split_once(':')?.1, 16).ok()?,
        local_is_loopback: is_loopback(address),
        state: u8::from_str_radix(state, 16).ok()?,
    })
}

/// The kernel prints addresses as words in its own byte order.
fn is_loopback(address: &str) -> bool {
    match address.len() {
        8 => address.ends_with("7F"),
        _ => {
            address == "00000000000000000000000001000000"
                || address.starts_with("0000000000000000FFFF0000") && address.ends_with("7F")
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const TABLE: &str =
        "  sl  local_address rem_address   st tx_queue rx_queue tr tm->when retrnsmt   uid  timeout inode
   0: 00000000:3A99 00000000:0000 0A 00000000:00000000 00:00000000 00000000     0        0 1
   1: 0100007F:3A99 0A00010A:C350 01 00000000:00000000 00:00000000 00000000     0        0 2
   2: 0A00010A:C350 0B00010A:0050 01 00000000:00000000 00:00000000 00000000     0        0 3
   3: 0100007F:1F90 0100007F:C350 01 00000000:00000000 00:00000000 00000000     0        0 4
   4: 0A00010A:3A9E 0B00010A:0050 06 00000000:00000000 00:00000000 00000000     0        0 5
";

    #[test]
    fn captured_and_older_flows_are_told_apart() {
        let rows: Vec<Row> = parse(TABLE).collect();
        assert_eq!(rows.len(), 5);
        assert_eq!(rows.iter().filter(|r| r.is_captured()).count(), 1);
        assert_eq!(rows.iter().filter(|r| r.is_foreign()).count(), 1);
    }

    proptest! {
        #[test]
        fn no_text_makes_the_parser_panic(text in "\\PC{0,200}") {
            assert!(parse(&format!("head\n{text}")).count() <= 1);
        }
    }
}
