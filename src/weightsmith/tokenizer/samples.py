"""Short texts by which tokenizers are told apart: many scripts, code, numbers and white space."""

from __future__ import annotations

# Script or language -> a text of it. Our own sentences, about as long as one another.
TEXTS = {
    "English": "The miller's daughter counted forty-two geese before the bell rang, then closed the heavy gate.",
    "German": "Die Tochter des Müllers zählte zweiundvierzig Gänse, bevor die Glocke läutete, und schloss das Tor.",
    "French": "La fille du meunier a compté quarante-deux oies avant que la cloche ne sonne, puis a fermé l'enclos.",
    "Spanish": "La hija del molinero contó cuarenta y dos gansos antes de que sonara la campana y cerró el portón.",
    "Turkish": "Değirmencinin kızı çan çalmadan önce kırk iki kaz saydı, sonra ağır kapıyı yavaşça kapattı.",
    "Vietnamese": "Con gái người thợ xay đếm bốn mươi hai con ngỗng trước khi chuông reo, rồi đóng cánh cổng nặng.",
    "Russian": "Дочь мельника насчитала сорок двух гусей, прежде чем прозвенел колокол, и закрыла тяжёлые ворота.",
    "Greek": "Η κόρη του μυλωνά μέτρησε σαράντα δύο χήνες πριν χτυπήσει η καμπάνα και έκλεισε τη βαριά πύλη.",
    "Hebrew": "בתו של הטוחן ספרה ארבעים ושניים אווזים לפני שצלצל הפעמון, ואז סגרה את השער הכבד.",
    "Arabic": "عدّت ابنة الطحّان اثنتين وأربعين إوزة قبل أن يدق الجرس، ثم أغلقت البوابة الثقيلة.",
    "Hindi": "चक्की वाले की बेटी ने घंटी बजने से पहले बयालीस हंस गिने और फिर भारी फाटक बंद कर दिया।",
    "Thai": "ลูกสาวของคนโม่แป้งนับห่านได้สี่สิบสองตัวก่อนระฆังจะดัง แล้วปิดประตูหนัก",
    "Korean": "방앗간 주인의 딸은 종이 울리기 전에 거위 마흔두 마리를 세고 무거운 문을 닫았다.",
    "Japanese": "粉屋の娘は鐘が鳴る前にガチョウを四十二羽数えて、それから重い門を閉めた。",
    "Chinese": "磨坊主的女儿在钟声响起之前数了四十二只鹅,然后关上了沉重的大门。",
    "Emoji": "Geese 🪿🪿 at the gate 🚪, all 42 of them 🎉👩🏽‍🌾!",
    "Python": "def total(prices, rate=0.19):\n    if not prices:\n        return 0\n\n    return sum(prices) * rate\n",
    "JSON": '{\n  "geese": [{"id": 17, "white": true, "weight": 4.25}],\n  "gate": null\n}\n',
    "Mathematics": "If $x^2 - 5x + 6 = 0$ then $x \\in \\{2, 3\\}$, since 1234 + 5678 = 6912 and 99 * 101 = 9999.",
}
NUMBERS = ("7", "42", "1234567", "3.14159", "1e-5", "2026-11-21", "12:30", "1,000,000", "-17")
# Digits alone, of lengths that tell groups counted from the left from those counted from the right.
DIGITS = ("1234567", "20251987", "31415926535", "9876543210123", "1000000", "27182818", "5040", "86400")
# What is looked at -> the text.
SPACES = {
    "two spaces": "a  b",
    "eight spaces": "a        b",
    "tab": "a\tb",
    "newline": "a\nb",
    "two newlines": "a\n\nb",
    "Windows newline": "a\r\nb",
    "leading space": " a",
    "trailing space": "a ",
    "indent": "    a",
}
