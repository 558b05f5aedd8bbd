use std::net::{Ipv4Addr, Ipv6Addr};

use hickory_proto::{
    op::{Edns, MessageType},
    rr::RData,
};

use super::*;

fn query(name: &str, kind: RecordType) -> Message {
    let mut message = Message::new(0x1234, MessageType::Query, OpCode::Query);
    message.metadata.recursion_desired = true;
    message.add_query(Query::query(Name::from_ascii(name).expect("name"), kind));
    message
}

fn bytes(message: &Message) -> Vec<u8> {
    message.to_vec().expect("encodable")
}

#[test]
fn address_queries_are_told_from_everything_else() {
    let read_name = |name: &str, kind| read(&bytes(&query(name, kind)));
    let web = || "web.demo.svc.cluster.local".to_owned();
    let expected = Incoming::Addresses { name: web(), family: Family::Ipv4 };
    assert_eq!(read_name("Web.demo.svc.CLUSTER.local.", RecordType::A), expected);
    let expected = Incoming::Addresses { name: web(), family: Family::Ipv6 };
    assert_eq!(read_name("web.demo.svc.cluster.local.", RecordType::AAAA), expected);
    assert_eq!(read_name("web.", RecordType::SRV), Incoming::Other(RecordType::SRV));
    assert_eq!(read_name(r"a\.b.demo.", RecordType::A), Incoming::Other(RecordType::A), "a dot within a label");
    let mut chaos = query("web.", RecordType::A);
    chaos.queries[0].set_query_class(DNSClass::CH);
    assert_eq!(read(&bytes(&chaos)), Incoming::Other(RecordType::A));
    let none = Message::new(1, MessageType::Query, OpCode::Query);
    assert_eq!(read(&bytes(&none)), Incoming::Other(RecordType::ZERO));
}

#[test]
fn what_is_no_query_is_refused_with_its_own_question() {
    let good = bytes(&query("web.", RecordType::A));
    let with = |at: usize, value: u8| {
        let mut bytes = good.clone();
        bytes[at] = value;
        bytes
    };
    assert_eq!(read(&good[..11]), Incoming::Stub);
    assert_eq!(read(&with(2, 0x81)), Incoming::Stub, "a response");
    assert_eq!(read(&with(2, 0x29)), Incoming::Refused(ResponseCode::NotImp), "an update");
    assert_eq!(read(&with(5, 2)), Incoming::Refused(ResponseCode::FormErr), "two questions");
    assert_eq!(read(&good[..14]), Incoming::Refused(ResponseCode::FormErr), "cut");
    let refused = Message::from_vec(&refusal(&good, ResponseCode::ServFail)).expect("reads");
    assert_eq!(refused.queries, query("web.", RecordType::A).queries);
    assert_eq!((refused.metadata.id, refused.metadata.response_code), (0x1234, ResponseCode::ServFail));
    assert!(refused.metadata.recursion_desired && refused.metadata.recursion_available);
    assert_eq!(refusal(&good[..14], ResponseCode::FormErr).len(), HEADER);
    assert!(answers(&refusal(&good, ResponseCode::ServFail), [0x12, 0x34]));
    assert!(!answers(&good, [0x12, 0x34]), "a query is no answer");
}

#[test]
fn an_answer_repeats_the_question_as_it_was_written_and_is_ours() {
    let mut asked = query("WEB.demo.svc.cluster.local.", RecordType::A);
    let mut edns = Edns::new();
    edns.set_max_payload(1232).set_version(0).set_dnssec_ok(true);
    asked.set_edns(edns);
    let addresses = [Ipv4Addr::new(10, 0, 0, 1).into(), Ipv4Addr::new(10, 0, 0, 2).into()];
    let reply = Reply { alias_of: None, addresses: &addresses, datagram: true };
    let answer = Message::from_vec(&answer(&bytes(&asked), &reply).expect("answer")).expect("reads");
    assert_eq!(answer.queries[0].name().to_ascii(), "WEB.demo.svc.cluster.local.");
    let m = answer.metadata;
    assert!(m.authoritative && m.recursion_available && m.recursion_desired && !m.truncation);
    assert_eq!(m.response_code, ResponseCode::NoError);
    let records: Vec<_> = answer.answers.iter().map(|r| (r.ttl, r.data.ip_addr())).collect();
    assert_eq!(records, addresses.map(|ip| (30, Some(ip))));
    let edns = answer.edns.expect("EDNS");
    assert!(edns.max_payload() == 1232 && edns.flags().dnssec_ok);
}

#[test]
fn a_name_with_a_search_domain_is_an_alias_of_the_one_meant() {
    let asked = bytes(&query("www.example.com.demo.svc.cluster.local.", RecordType::AAAA));
    let reply = Reply { alias_of: Some("www.example.com"), addresses: &[Ipv6Addr::LOCALHOST.into()], datagram: true };
    let answer = Message::from_vec(&answer(&asked, &reply).expect("answer")).expect("reads");
    let owners: Vec<String> = answer.answers.iter().map(|r| r.name.to_ascii()).collect();
    assert_eq!(owners, ["www.example.com.demo.svc.cluster.local.", "www.example.com."]);
    assert!(matches!(&answer.answers[0].data, RData::CNAME(name) if name.0.to_ascii() == "www.example.com."));
}

#[test]
fn what_a_datagram_cannot_hold_is_left_to_tcp() {
    let asked = bytes(&query("db.demo.svc.cluster.local.", RecordType::A));
    let addresses: Vec<IpAddr> = (0..500u32).map(|i| Ipv4Addr::from_bits(0x0a00_0000 + i).into()).collect();
    let by = |datagram| {
        let reply = Reply { alias_of: None, addresses: &addresses, datagram };
        answer(&asked, &reply).expect("answer")
    };
    let (datagram, stream) = (by(true), by(false));
    assert!(datagram.len() <= 512);
    let datagram = Message::from_vec(&datagram).expect("reads");
    assert!(datagram.metadata.truncation && datagram.answers.len() > 15, "{}", datagram.answers.len());
    assert_eq!(datagram.answers.len(), (512 - 12 - 31) / 16);
    let long = format!("{}.", vec!["a".repeat(62); 4].join("."));
    let reply = Reply { alias_of: Some(&long), addresses: &addresses, datagram: true };
    let cut = answer(&bytes(&query(&long, RecordType::A)), &reply).expect("answer");
    assert!(cut.len() <= 512 && Message::from_vec(&cut).expect("reads").metadata.truncation);
    let stream = Message::from_vec(&stream).expect("reads");
    assert!(!stream.metadata.truncation && stream.answers.len() == 500);
}
