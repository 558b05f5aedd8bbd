//! What a successor would do with a tunnel that was restored from a blob nobody vouches for: none of it may panic.

use std::time::Duration;

use http::{HeaderMap, StatusCode};
use mesh_hbone::{
    Budget,
    engine::{
        conn::{Event, Room},
        frame::ErrorCode,
        out::{Filled, MAX_READ},
        state,
        tunnel::Tunnel,
    },
};

/// Lets `tunnel` hear `plaintext`, and does everything that a driver and its streams do.
pub(crate) fn exercise(mut tunnel: Tunnel, plaintext: &[u8]) {
    let budget = Budget::default();
    tunnel.conn.set_budget(budget.clone());
    let first = tunnel.conn.now();
    let mut streams = vec![1, 3, 5];
    let mut at = 0;
    let mut over = false;
    for turn in 0..3 {
        tunnel.conn.set_now(first + turn * Duration::from_secs(4));
        over = over || tunnel.conn.on_time(&mut tunnel.out).is_err();
        while !over {
            match tunnel.conn.next(plaintext, &mut at, &mut tunnel.out) {
                Ok(Some(Event::Data { stream, range })) => {
                    tunnel.conn.consumed(stream, plaintext[range].len(), &mut tunnel.out);
                }
                Ok(Some(Event::Request { stream, .. } | Event::Response { stream, .. })) => streams.push(stream),
                Ok(Some(_)) => {}
                Ok(None) => break,
                Err(error) => {
                    tunnel.fail(&error.into());
                    over = true;
                }
            }
        }
        let opened = tunnel.conn.connect("a:1", std::iter::empty(), &mut tunnel.out);
        streams.extend(opened.ok());
        for id in &streams {
            tunnel.conn.respond(*id, StatusCode::OK, &HeaderMap::new(), false, &mut tunnel.out);
            if let Room::Bytes(room) = tunnel.conn.room(*id) {
                let filled =
                    tunnel.out.fill(*id, room.min(MAX_READ), |slices| Ok(slices.iter().map(|s| s.len()).sum()));
                let Filled { bytes, frames, .. } = filled.expect("memory can be read");
                tunnel.conn.sent(*id, bytes, frames);
            }
        }
        match turn {
            0 => tunnel.conn.drain(&mut tunnel.out),
            1 => over |= tunnel.rotate().is_err(),
            _ => streams.drain(..).for_each(|id| match id % 4 {
                1 => tunnel.conn.finish(id, &mut tunnel.out),
                _ => tunnel.conn.reset(id, ErrorCode::CANCEL, &mut tunnel.out),
            }),
        }
        while tunnel.conn.pending_event().is_some() {}
        while tunnel.seal(1 << 16).is_ok() {
            let ready: usize = tunnel.out.ready().map(<[u8]>::len).sum();
            if ready == 0 {
                break;
            }
            tunnel.out.advance(ready.min(10_000));
        }
        if over {
            // There is nothing to hand over.
            continue;
        }
        let blob = state::encode(&tunnel);
        let restored: Tunnel = state::decode(&blob).expect("what was saved can be restored");
        assert!(*state::encode(&restored) == *blob, "a restored tunnel is saved as it was");
        tunnel = restored;
        tunnel.conn.set_budget(budget.clone());
    }
    tunnel.close();
    drop(tunnel);
    assert_eq!(budget.used(), 0, "memory is charged for a tunnel that is gone");
}
