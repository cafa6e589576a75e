use proptest::prelude::*;
use serde_json::json;

use super::*;

/// Feeds `input` in pieces of `step` bytes.
fn feed(stream: &mut Stream, input: &[u8], step: usize) -> Vec<Result<Value, StreamError>> {
    let mut out = Vec::new();
    for mut piece in input.chunks(step) {
        while let Some(item) = stream.next(&mut piece) {
            out.push(item);
        }
    }
    out
}

fn read(input: &[u8]) -> Vec<Result<Value, StreamError>> {
    let whole = feed(&mut Stream::default(), input, usize::MAX);
    let bytewise = feed(&mut Stream::default(), input, 1);
    assert_eq!(whole, bytewise, "how the bytes arrive must not matter");
    whole
}

#[test]
fn values_need_nothing_between_them() {
    assert_eq!(
        read(br#"{"a":1}{"b":[2,{}]} [3]"x""#),
        [Ok(json!({"a": 1})), Ok(json!({"b": [2, {}]})), Ok(json!([3])), Ok(json!("x"))]
    );
}

#[test]
fn a_number_or_keyword_ends_where_another_thing_begins() {
    assert_eq!(
        read(b"null 12{} -1.5e+3\n"),
        [Ok(json!(null)), Ok(json!(12)), Ok(json!({})), Ok(json!(-1500.0))]
    );
    assert_eq!(read(b"12"), []);
}

#[test]
fn an_incomplete_value_waits() {
    let mut stream = Stream::default();
    assert_eq!(feed(&mut stream, b"{\"execute\": \"quer", 3), []);
    assert_eq!(feed(&mut stream, b"y-version\"}", 3), [Ok(json!({"execute": "query-version"}))]);
}

#[test]
fn single_quotes_are_strings_too() {
    assert_eq!(
        read(br#"{'execute': 'say "hi"', "it": "it\'s", 'c': 'it\'s\\\n'}"#),
        [Ok(json!({"execute": "say \"hi\"", "it": "it's", "c": "it's\\\n"}))]
    );
}

#[test]
fn braces_in_strings_do_not_count() {
    assert_eq!(read(br#"{"a":"}{\"]["}"#), [Ok(json!({"a": "}{\"]["}))]);
}

#[test]
fn after_a_stray_byte_the_next_command_is_understood() {
    for garbage in
        [&b"{\xFF"[..], b"{\x01", b"{'bad \xFF", b"{'execute': 'x', 'id':'\n", b"%%p", b"{\x01rest"]
    {
        let mut input = garbage.to_vec();
        input.extend(b"{'execute': 'a'}");
        let items = read(&input);
        assert_eq!(items.len(), 2, "{}", garbage.escape_ascii());
        assert!(matches!(items[0], Err(StreamError::Stray(_))), "{items:?}");
        assert_eq!(items[1], Ok(json!({"execute": "a"})));
    }
}

#[test]
fn what_does_not_match_ends_at_once() {
    for garbage in [&b"{]"[..], b"[}", b"}", b"]", b",", b":", b"[1 2]", b"{1:2}", b"{\"a\" 1}", b"nonsense "]
    {
        let mut input = garbage.to_vec();
        input.extend(b"[]");
        let items = read(&input);
        assert!(matches!(&items[..], [Err(StreamError::Syntax(_)), Ok(Value::Array(_))]), "{items:?}");
    }
}

#[test]
fn strings_must_be_utf8_and_their_escapes_known() {
    for bad in [&b"[\"\xC3(\"]"[..], br#"["\q"]"#, br#"["\ud800"]"#, br#"["\u12"]"#] {
        assert!(matches!(&read(bad)[..], [Err(StreamError::Syntax(_))]), "{}", bad.escape_ascii());
    }
    assert_eq!(read("[\"ü\\u00fc\"]".as_bytes()), [Ok(json!(["üü"]))]);
}

#[test]
fn the_error_is_worded_as_by_qemu() {
    assert_eq!(StreamError::Stray(0xFF).to_string(), "JSON parse error, stray '\\xff'");
    assert_eq!(
        StreamError::Syntax("expecting value".into()).to_string(),
        "JSON parse error, expecting value"
    );
    assert_eq!(StreamError::TooLong.to_string(), "JSON token size limit exceeded");
    assert_eq!(StreamError::TooDeep.to_string(), "JSON nesting depth limit exceeded");
}

#[test]
fn depth_is_bounded() {
    let nested = |depth: usize| [vec![b'['; depth], vec![b']'; depth]].concat();
    assert!(matches!(&read(&nested(MAX_DEPTH))[..], [Ok(Value::Array(_))]));
    let items = feed(&mut Stream::default(), &nested(MAX_DEPTH + 1)[..MAX_DEPTH + 1], 1);
    assert_eq!(items, [Err(StreamError::TooDeep)]);
}

#[test]
fn length_is_bounded_and_memory_with_it() {
    let mut stream = Stream::default();
    assert_eq!(feed(&mut stream, b"{'id':'", 1), []);
    let items = feed(&mut stream, &vec![b'a'; MAX_LENGTH], 1000);
    assert_eq!(items.first(), Some(&Err(StreamError::TooLong)));
    assert!(stream.text.capacity() <= 2 * MAX_LENGTH);
    let fits = format!("\"{}\"", "a".repeat(MAX_LENGTH - 2));
    assert_eq!(read(fits.as_bytes()).len(), 1);
    // Single-quoted, each quotation mark grows by an escape.
    let grows = format!("'{}'", "\"".repeat(MAX_LENGTH));
    assert_eq!(feed(&mut Stream::default(), grows.as_bytes(), 7).first(), Some(&Err(StreamError::TooLong)));
}

fn any_json() -> impl Strategy<Value = Value> {
    let leaf = prop_oneof![
        Just(Value::Null),
        any::<bool>().prop_map(Value::from),
        any::<i64>().prop_map(Value::from),
        any::<String>().prop_map(Value::from),
    ];
    leaf.prop_recursive(4, 32, 4, |inner| {
        prop_oneof![
            prop::collection::vec(inner.clone(), 0..4).prop_map(Value::from),
            prop::collection::btree_map(any::<String>(), inner, 0..4)
                .prop_map(|map| Value::Object(map.into_iter().collect())),
        ]
    })
}

proptest! {
    #[test]
    fn any_values_in_any_pieces_come_out_whole(values in prop::collection::vec(any_json(), 1..5), step in 1_usize..9) {
        let text: String = values.iter().map(|value| format!("{value}\n")).collect();
        let items = feed(&mut Stream::default(), text.as_bytes(), step);
        prop_assert_eq!(items, values.into_iter().map(Ok).collect::<Vec<_>>());
    }

    #[test]
    fn garbage_never_holds_the_stream_for_good(garbage in prop::collection::vec(any::<u8>(), 0..200)) {
        let mut stream = Stream::default();
        feed(&mut stream, &garbage, 16);
        feed(&mut stream, b"\xFF", 1);
        prop_assert_eq!(feed(&mut stream, b"{\"execute\":\"x\"}", 4), [Ok(json!({"execute": "x"}))]);
    }
}
